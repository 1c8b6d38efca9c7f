"""A cost model of the operators: time and memory against batch, heads, tokens, head_dim and ranks.

    python -m effattn.bench.scaling measure --json FILE    time, memory and messages on this machine; goes on where it stopped
    python -m effattn.bench.scaling page                   docs/scaling.md and its picture from the newest measurement
    python -m effattn.bench.scaling predict OPERATOR ...   time and memory of one call

Time is a sum of counted units (calls, tokens, pairs, products, ...), each with a price: ``subjects.py`` counts, ``model.py``
finds the prices by non-negative least squares and compares predictions with sizes that had no part in it. Memory is
counted from what the operators allocate (``allocation.py``), messages from the code that sends them (``ranks.py``).
"""
