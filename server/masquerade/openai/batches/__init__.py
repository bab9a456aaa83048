"""`/v1/batches`: files of requests that the server answers in the background."""
