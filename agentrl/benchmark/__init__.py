"""Methods x seeds x environments from one file: the runs, side by side, and one table of what came out."""
