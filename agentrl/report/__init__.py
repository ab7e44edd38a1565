"""Pictures and reports of runs: the HTML report (`make_report`, `render`), learning curves, plots of the credit lab."""
