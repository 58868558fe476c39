"""The benchmarks: `make bench`, `fastdiff bench` or `python -m benchmarks.run`, from the source checkout.

cases.py says what is measured, operators.py, network.py and sampling.py how it is called, measure.py how it
is timed, record.py what a row of the CSV holds; table.py and plot.py read the CSV.
"""
