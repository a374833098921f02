"""The asset graph of a study: which partition is made from which, by name, up and down.

Dagster's definitions, ``persona-assets run`` and ``status``, and the guards inside the assets all
read this one graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

from persona_assets.asset_row import Asset
from persona_assets.asset_table import asset_table
from persona_assets.naming import unknown
from persona_assets.store import Ref
from persona_assets.study import Study


class Graph:
    """The assets of one study, in topological order."""

    def __init__(self, study: Study):
        self.study = study

    @cached_property
    def assets(self) -> Mapping[str, Asset]:
        """Every asset by name, upstream ones first."""
        return {asset.name: asset for asset in asset_table(self.study)}

    @property
    def refs(self) -> tuple[Ref, ...]:
        """Every partition of every asset, upstream ones first."""
        return tuple(ref for asset in self.assets.values() for ref in asset.refs())

    def upstream(self, ref: Ref) -> tuple[Ref, ...]:
        """The partitions that a partition is made from."""
        return self.assets[ref.asset].upstream(ref.key)

    def made_from(self, ref: Ref) -> tuple[Ref, ...]:
        """The partitions that one is made from, directly or not, and itself; upstream ones last."""
        found = {ref: None}
        above = [ref]
        while above:
            for upstream in self.upstream(above.pop()):
                if upstream not in found:
                    found[upstream] = None
                    above.append(upstream)
        return tuple(found)

    def ancestors(self, asset: str) -> frozenset[str]:
        """The assets that ``asset`` is made from, directly or not, and itself.

        Raises:
            KeyError: no such asset; names the nearest.
        """
        if asset not in self.assets:
            raise KeyError(unknown(asset, self.assets, "asset", self.study.name))
        above = (self.ancestors(name) for name in self.upstream_assets(asset))
        return frozenset({asset}).union(*above)

    def find(self, name: str) -> tuple[Ref, ...]:
        """The partitions that a cell's key, an asset's name or ``asset[key]`` names.

        A cell's key names all that is made for it, upstream first.

        Raises:
            KeyError: nothing has that name; names the nearest.
        """
        by_name = {str(ref): (ref,) for ref in self.refs}
        by_name |= {asset.name: asset.refs() for asset in self.assets.values()}
        for cell in self.study.cells:
            by_name[cell.key] = (
                Ref("rationales", cell.condition),
                *(Ref(a.name, cell.key) for a in self.assets.values() if a.has(cell.key)),
            )
        if name not in by_name:
            raise KeyError(unknown(name, by_name, "cell, asset or partition", self.study.name))
        return by_name[name]

    def key_mapping(self, asset: str, upstream: str) -> dict[str, set[str]]:
        """Upstream key → the keys of ``asset`` made from it, for two partitioned assets."""
        mapping: dict[str, set[str]] = {}
        for key in self.assets[asset].keys or ():
            for ref in self.assets[asset].upstream(key):
                if ref.asset == upstream and ref.key is not None:
                    mapping.setdefault(ref.key, set()).add(key)
        return mapping

    def upstream_assets(self, asset: str) -> tuple[str, ...]:
        """Names of the assets that any partition of ``asset`` is made from, upstream first."""
        node = self.assets[asset]
        names = {ref.asset for own in node.refs() for ref in node.upstream(own.key)}
        return tuple(name for name in self.assets if name in names)
