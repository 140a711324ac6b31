"""Speed and quality beside the peers. ``python -m benchmarks`` runs everything; see the Makefile."""
