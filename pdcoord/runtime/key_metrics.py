"""Metrics of who was let in, and of the files that say so."""

from pdcoord.runtime.metricspec import MetricSpec, MetricType

AUTH_FAILURES = MetricSpec(
    "pdcoord_gateway_auth_failures_total",
    MetricType.COUNTER,
    ("listener", "reason"),
    "Calls answered with 401, at the front or the admin listener: missing (no key came), ambiguous (two that "
    "differ), unknown, expired. All 0 where no key is asked for.",
    "expired: a client was not given its new key. unknown rising: a key was taken out of the file while it "
    "was in use, or somebody is trying; logs never have the key, so look at where the calls come from.",
)
RATE_LIMITED = MetricSpec(
    "pdcoord_gateway_rate_limited_total",
    MetricType.COUNTER,
    ("key", "rate"),
    "Calls answered with 429 because their API key had used up its requests or tokens per minute.",
    "The client does not heed Retry-After, or its rate in the keys file is too low. Each replica counts by "
    "itself.",
)
KEY_RELOADS = MetricSpec(
    "pdcoord_gateway_key_reloads_total",
    MetricType.COUNTER,
    ("file", "outcome"),
    "Changes of the files of API keys, of the admin listener's key and of the engines' key, accepted or "
    "refused.",
    "refused: the last good content is in force; the log line keys.refused says why.",
)
KEYS_STALE = MetricSpec(
    "pdcoord_gateway_keys_stale",
    MetricType.GAUGE,
    ("file",),
    "1 while one of these files holds something that is not in force because it was refused.",
    "Alert on 1: a key that was taken out is still let in.",
)
KEYS = MetricSpec(
    "pdcoord_gateway_keys",
    MetricType.GAUGE,
    (),
    "API keys in force, expired ones among them; 0 where every call is let in.",
    "0 where the gateway can be reached by strangers: set PDCOORD_KEYS_FILE.",
)

KEY_METRICS = (AUTH_FAILURES, RATE_LIMITED, KEY_RELOADS, KEYS_STALE, KEYS)
