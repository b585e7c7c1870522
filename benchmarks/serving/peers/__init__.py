"""Adapters of the engines that can be compared."""

from __future__ import annotations

from kara_sglang.benchmarks.serving.peers.base import Peer, start
from kara_sglang.benchmarks.serving.peers.sglang import SGLang
from kara_sglang.benchmarks.serving.peers.vllm import VLLM

__all__ = ["PEERS", "Peer", "start"]

PEERS: dict[str, Peer] = {peer.name: peer for peer in (SGLang(), VLLM())}
