"""Decides who trains, what is accepted and which model version goes where."""
