"""The benchmarks: `make bench`, `fastdiff bench` or `python -m benchmarks.run`, from the source checkout.

cases.py says what is measured, operators.py, network.py, drop_in.py, accelerated.py and sampling.py how it is called,
compilers.py who else compiles networks, fresh.py what one needs in a process of its own, gate.py what is right,
measure.py how it is timed, record.py what a row of the CSV holds; table.py and plot.py read the CSV. profiles.py tells
where the time of a network goes. rewrites.py counts instead of timing, quality.py and convergence.py measure what is
drawn.
"""
