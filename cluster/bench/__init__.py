"""`tidemill bench`: load on a running cluster, as its clients would make it, and how well it was served.

arrivals.py  which requests come when      pure
drive.py     sends them, whatever comes back
summary.py   attainment, goodput, percentiles      pure
report.py    table and CSV      plots.py  PNG
command.py   the command
"""
