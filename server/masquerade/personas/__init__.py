"""`/v1/personas`: routes and wire objects."""
