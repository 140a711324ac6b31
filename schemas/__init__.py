"""What is read from and written to files, as pydantic models: pipelines, reports, manifests. Imports nothing of graphopt."""
