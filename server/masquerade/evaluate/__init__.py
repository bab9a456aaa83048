"""Measures what a mask does: datasets, likelihoods, figures with intervals, and controls to compare with."""
