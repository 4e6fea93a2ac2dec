"""Speed measurements, side by side with other packages, and experiments of many training runs."""
