"""Launchers: start a training run on one machine or on many."""
