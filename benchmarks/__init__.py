"""How fast, how large and how exact, next to the packages that people use today.

    python -m benchmarks overhead linear      run cases, write records/<case>-<device>.csv
    python -m benchmarks report               rewrite the tables of the documentation

Peers are imported from their installed packages; those that are missing are listed as such.
"""
