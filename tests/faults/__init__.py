"""The fault-injection programme: what a run survives, counted.

make faults                                  # the full programme and its table, written to docs/reliability.md
pytest tests/faults                          # the same at a size for CI
"""
