"""Speed, side by side with the libraries that everyone uses. `make bench` writes docs/BENCH.md."""
