"""The page of the report: hand-written template, styles and code; `vendor.py` fetches the charting library."""
