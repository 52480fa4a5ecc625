"""Pure tensor mathematics: the paper's modules (`tmas`, `cgq`), statistics, grids and solvers. Imports torch only."""
