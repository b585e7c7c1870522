"""Results of the serving benchmark, made up."""

from __future__ import annotations


def result(row: str, repetition: int, speed: float, **changes: object) -> dict:
    scenario, point = changes.pop("scenario", "scarce"), changes.pop("point", "equal work")
    return {
        "key": f"{scenario}/{point}/{row}",
        "scenario": scenario,
        "point": point,
        "row": row,
        "repetition": repetition,
        "pool": 100,
        "requests": 12,
        "client": dict.fromkeys(
            ("request_throughput", "median_ttft_ms", "p99_ttft_ms", "median_itl_ms", "p99_itl_ms"), 1.0
        )
        | {"output_throughput": speed},
        "counters": {
            "decode_steps": 100,
            "mean_running": 2.0,
            "peak_running": 3,
            "retractions": 0,
            "hit_rate": 0.5,
            "held": 1.0,
            "without_queries": None,
            "schedule": {"2": [100, 6000]},
        },
        "cpu_seconds_per_output_token": 0.01,
        "probe": None,
    } | changes
