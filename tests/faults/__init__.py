"""The fault-injection programme: inject faults into runs and count what they survive.

make faults                                  # the full programme; writes docs/reliability.md
pytest tests/faults                          # a short programme for continuous integration
"""
