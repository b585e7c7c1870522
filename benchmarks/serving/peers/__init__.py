"""Adapters of the engines that can be compared."""

from __future__ import annotations

from kara_sglang.benchmarks.serving.peers.base import Offline, Peer, Setup
from kara_sglang.benchmarks.serving.peers.nano_kvllm import NanoKvllm
from kara_sglang.benchmarks.serving.peers.sglang import SGLang
from kara_sglang.benchmarks.serving.peers.vllm import VLLM

__all__ = ["PEERS", "Offline", "Peer", "Setup"]

PEERS: dict[str, Peer | Offline] = {peer.name: peer for peer in (SGLang(), VLLM(), NanoKvllm())}
