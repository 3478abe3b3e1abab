"""What the gateway counts, in the process's Prometheus registry."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

CALLS = Counter("kat_gateway_calls_total", "Model calls recorded as turns", ["dialect", "finish"])
FORKS = Counter("kat_gateway_forks_total", "Turns that did not extend the newest turn of their thread", ["reason"])
SIDE = Counter("kat_gateway_side_total", "Calls served and recorded, not trained", ["reason"])
ILL_FORMED = Counter("kat_gateway_ill_formed_total", "Replies with a tool call that does not parse")
TURNED_AWAY = Counter("kat_gateway_turned_away_total", "Connections closed at the door", ["reason"])
REFUSED = Counter("kat_gateway_refused_total", "Requests answered with an error", ["status"])
COALESCED = Counter("kat_gateway_coalesced_total", "Retries that joined a call instead of making one")
RESUMED = Counter("kat_gateway_resumed_total", "Calls sent to an engine again in mid-turn", ["reason"])
TAKEN_OVER = Counter("kat_gateway_taken_over_total", "Sessions rebuilt from the log")
LET_GO = Counter("kat_gateway_let_go_total", "Sessions given up to another gateway", ["reason"])
TOKENS = Counter("kat_gateway_tokens_total", "Tokens of model calls", ["kind"])
SESSIONS = Gauge("kat_gateway_sessions", "Open sessions")
IN_FLIGHT = Gauge("kat_gateway_calls_in_flight", "Model calls being served")
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
CALL_SECONDS = Histogram("kat_gateway_call_seconds", "From request to acknowledged turn", buckets=_SECONDS)
PUBLISH_SECONDS = Histogram("kat_gateway_publish_seconds", "Wait for the log to acknowledge a turn", buckets=_SECONDS)
TAKEOVER_SECONDS = Histogram("kat_gateway_takeover_seconds", "To take a session over", buckets=_SECONDS)
