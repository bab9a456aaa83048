"""The contract: OpenAI's routes, with personas.

Knows HTTP, and renders everything below it. Refuses to know how tokens are made.
"""

from masquerade.api.app import create_app
from masquerade.api.serving import Serving

__all__ = ["Serving", "create_app"]
