"""Does a mask do what it says? Data, metrics, and the controls it is held against.

Knows examples and likelihoods. Refuses to know how masks are built and served.
"""
