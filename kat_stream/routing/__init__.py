"""Which engine runs a model call. `Router` keeps the fleet's state; a policy, one a file, chooses."""

from kat_stream.routing.engine_state import EngineState
from kat_stream.routing.policy import RoutingPolicy
from kat_stream.routing.router import Router
from kat_stream.routing.sticky import StickyLeastLoaded

__all__ = ["EngineState", "Router", "RoutingPolicy", "StickyLeastLoaded"]
