"""Speed, side by side with the libraries that everyone uses. `make bench` prints the table."""
