"""Reading an engine's metrics text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdcoord.core.fleet import Sample
from pdcoord.feeds.samples import parse_sample

VLLM = b"""\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="demo/llama-8b"} 3.0
# HELP vllm:num_requests_waiting Number of requests waiting to be processed.
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0",model_name="demo/llama-8b"} 5.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="demo/llama-8b",reason="capacity"} 3.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="demo/llama-8b",reason="deferred"} 2.0
vllm:kv_cache_usage_perc{engine="0",model_name="demo/llama-8b"} 0.25
vllm:time_to_first_token_seconds_bucket{engine="0",le="0.001",model_name="demo/llama-8b"} 0.0
"""

SGLANG = b"""\
# TYPE sglang:num_running_reqs gauge
sglang:num_running_reqs{engine_type="unified",model_name="m",tp_rank="0"} 7.0
sglang:num_queue_reqs{engine_type="unified",model_name="m",tp_rank="0"} 2.0
sglang:token_usage{engine_type="unified",model_name="m",tp_rank="0"} 0.5
"""


def test_vllm_waiting_is_without_what_waits_for_its_kv() -> None:
    assert parse_sample(VLLM, at_s=4.0) == Sample(running=3, waiting=3, kv_usage=0.25, at_s=4.0)


def test_sglang_names() -> None:
    assert parse_sample(SGLANG, at_s=1.0) == Sample(running=7, waiting=2, kv_usage=0.5, at_s=1.0)


def test_counts_are_summed_over_data_parallel_ranks_and_usage_is_their_mean() -> None:
    text = b"\n".join(
        b'%b{engine="%d",model_name="m"} %b' % (name, rank, value)
        for rank, values in enumerate(((b"1", b"4", b"0.2"), (b"2", b"0", b"0.6")))
        for name, value in zip(
            (b"vllm:num_requests_running", b"vllm:num_requests_waiting", b"vllm:kv_cache_usage_perc"),
            values,
            strict=True,
        )
    )
    assert parse_sample(text, at_s=0.0) == Sample(running=3, waiting=4, kv_usage=0.4, at_s=0.0)


def test_names_without_labels_and_the_older_name_of_usage() -> None:
    text = b"vllm:num_requests_running 1\nvllm:num_requests_waiting 0\nvllm:gpu_cache_usage_perc 0.75\n"
    assert parse_sample(text, at_s=0.0) == Sample(running=1, waiting=0, kv_usage=0.75, at_s=0.0)


def test_braces_and_quotes_inside_label_values() -> None:
    text = (
        b'vllm:num_requests_running{model_name="a}\\"b{,"} 1\n'
        b'vllm:num_requests_waiting{model_name="a}\\"b{,"} 2\n'
    )
    assert parse_sample(text, at_s=0.0) == Sample(running=1, waiting=2, kv_usage=0.0, at_s=0.0)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"vllm:num_requests_running 1\n",
        b"sglang:num_queue_reqs 1\n",
        b"vllm:num_requests_running NaN\nvllm:num_requests_waiting 0\n",
        b"vllm:num_requests_running x\nvllm:num_requests_waiting 0\n",
        b"prefix_vllm:num_requests_running 1\nvllm:num_requests_waiting 0\n",
        b"# vllm:num_requests_running 1\nvllm:num_requests_waiting 0\n",
        b"vllm:num_requests_running_total 1\nvllm:num_requests_waiting 0\n",
        b"<html>404</html>",
    ],
)
def test_text_without_both_counts_is_no_sample(text: bytes) -> None:
    assert parse_sample(text, at_s=0.0) is None


def test_values_out_of_range_are_brought_into_it() -> None:
    text = b"vllm:num_requests_running 1e300\nvllm:num_requests_waiting 0\nvllm:kv_cache_usage_perc 7\n"
    sample = parse_sample(text, at_s=0.0)
    assert sample is not None
    assert (sample.running, sample.kv_usage) == (1 << 31, 1.0)


@given(st.binary(max_size=400), st.integers(min_value=0, max_value=400))
def test_any_bytes_are_read_without_an_error(noise: bytes, position: int) -> None:
    parse_sample(VLLM[:position] + noise + VLLM[position:], at_s=0.0)


COUNTERS = b"""\
vllm:num_requests_running 1
vllm:num_requests_waiting 0
vllm:cache_config_info{block_size="16",cache_dtype="auto",engine="0",num_gpu_blocks="27000"} 1.0
vllm:prompt_tokens_by_source_total{engine="0",source="local_compute"} 900.0
vllm:prompt_tokens_by_source_total{engine="0",source="external_kv_transfer"} 1425.0
vllm:nixl_num_failed_transfers_total{engine="0"} 2.0
vllm:nixl_xfer_time_seconds_bucket{engine="0",le="0.5"} 30.0
vllm:nixl_xfer_time_seconds_count{engine="0"} 40.0
vllm:pdcoord_failures_total{engine="0",kind="stale-epoch"} 3.0
vllm:pdcoord_failures_total{engine="0",kind="staging-full"} 40.0
"""


def test_the_pools_size_and_the_counters_of_pulls() -> None:
    sample = parse_sample(COUNTERS, at_s=0.0)
    assert sample is not None
    assert sample.kv_tokens == 432_000
    assert (sample.pulled_tokens, sample.computed_tokens) == (1_425, 900)
    # Overload is not a failure of the path.
    assert (sample.failed_pulls, sample.arrived_pulls) == (5, 40)


def test_sglang_counts_pulls_that_failed() -> None:
    text = SGLANG + b"sglang:max_total_num_tokens 500000.0\nsglang:num_transfer_failed_reqs_total 1.0\n"
    sample = parse_sample(text, at_s=0.0)
    assert sample is not None
    assert (sample.kv_tokens, sample.failed_pulls, sample.pulled_tokens) == (500_000, 1, None)
