"""Measurements of the devices at hand: what they compute, read and send each second."""
