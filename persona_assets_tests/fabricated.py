"""A study whose partitions are landed by fiat: manifests as real ones, contents made up."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import polars as pl

from persona_assets.audit import Audit
from persona_assets.freshness import Freshness
from persona_assets.graph import Graph
from persona_assets.store import Provenance, Ref, Store
from persona_assets.study import parse_study


@dataclass(frozen=True)
class Fabricated:
    """A data folder with the study ``tiny``, and a hand that lands its partitions."""

    data: Path

    @property
    def graph(self) -> Graph:
        """The graph of the study file as it is now."""
        return _graph((self.data / "studies" / "tiny.yaml").read_text("utf-8"))

    @property
    def store(self) -> Store:
        return Store(self.data / "store", "tiny")

    def edit(self, before: str, after: str) -> None:
        """Change the study file."""
        path = self.data / "studies" / "tiny.yaml"
        text = path.read_text("utf-8")
        assert before in text
        path.write_text(text.replace(before, after), "utf-8")

    def land(
        self,
        *refs: Ref,
        run_id: str = "by hand",
        content: str = "content",
        audits: Iterable[Audit] = (),
    ) -> None:
        """Land partitions as runs would, from what is there now."""
        graph = self.graph
        for ref in refs:
            freshness = Freshness(graph, self.store)
            with self.store.draft(ref) as draft:
                if ref.asset == "contrast_estimate":
                    _estimates().write_parquet(draft / "estimates.parquet")
                (draft / "file").write_text(f"{ref} {content}")
                accuracies = {f"accuracy_{s}": 0.25 for s in graph.study.scaffolds}
                self.store.land(
                    ref,
                    draft,
                    audits=audits,
                    summary=accuracies if ref.asset.endswith("_outcomes") else {},
                    provenance=Provenance(run_id, freshness.inputs(ref), graph.study.content_hash),
                )

    def land_all(self, wanted: Callable[[Ref], bool] = lambda ref: True) -> None:
        """Land what is wanted of the study, upstream first."""
        self.land(*(r for a in self.graph.assets.values() for r in a.refs() if wanted(r)))

    def remove(self, *refs: Ref) -> None:
        """Let partitions not have landed."""
        for ref in refs:
            (self.store.folder(ref) / "manifest.json").unlink()


@lru_cache
def _graph(text: str) -> Graph:
    return Graph(parse_study(text))


def _estimates() -> pl.DataFrame:
    return pl.DataFrame(
        {
            "scope": ["macro", "macro", "librarian"],
            "scheme": ["question", "pairs", "question"],
            "estimate": [0.125, 0.5, 0.5],
            "ci_low": [0.0625, 0.5, 0.5],
            "ci_high": [0.1875, 0.5, 0.5],
        }
    )
