"""The synthetic Europe: where its places are, and what a place looks like. numpy only.

Nothing here pretends to be the real Europe but the towns' coordinates. Looks are smooth random fields over the map,
like climate and soil, and one set of road furniture for each country, where a country is whatever lies nearest to its
capital.

Shape letters: N places.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from geoloc_batch.geo.sphere import unit_vectors

Floats = NDArray[np.float64]

# Towns that people gather around: (lat, lon) in degrees.
_TOWNS = {
    "Lisboa": (38.7, -9.1), "Porto": (41.1, -8.6), "Madrid": (40.4, -3.7), "Sevilla": (37.4, -6.0),
    "Valencia": (39.5, -0.4), "Barcelona": (41.4, 2.2), "Bilbao": (43.3, -2.9), "Granada": (37.2, -3.6),
    "Toulouse": (43.6, 1.4), "Bordeaux": (44.8, -0.6), "Nantes": (47.2, -1.6), "Paris": (48.9, 2.4),
    "Lyon": (45.8, 4.8), "Marseille": (43.3, 5.4), "Dijon": (47.3, 5.0), "Bruxelles": (50.8, 4.4),
    "Amsterdam": (52.4, 4.9), "London": (51.5, -0.1), "Leeds": (53.8, -1.5), "Plymouth": (50.4, -4.1),
    "Glasgow": (55.9, -4.3), "Inverness": (57.5, -4.2), "Dublin": (53.3, -6.3), "Galway": (53.3, -9.0),
    "Hamburg": (53.6, 10.0), "Berlin": (52.5, 13.4), "Koeln": (50.9, 7.0), "Muenchen": (48.1, 11.6),
    "Zuerich": (47.4, 8.5), "Wien": (48.2, 16.4), "Graz": (47.1, 15.4), "Praha": (50.1, 14.4),
    "Milano": (45.5, 9.2), "Firenze": (43.8, 11.3), "Roma": (41.9, 12.5), "Napoli": (40.9, 14.3),
    "Bari": (41.1, 16.9), "Palermo": (38.1, 13.4), "Cagliari": (39.2, 9.1), "Zagreb": (45.8, 16.0),
    "Split": (43.5, 16.4), "Sarajevo": (43.9, 18.4), "Beograd": (44.8, 20.5), "Tirana": (41.3, 19.8),
    "Skopje": (42.0, 21.4), "Athina": (38.0, 23.7), "Thessaloniki": (40.6, 22.9), "Iraklio": (35.3, 25.1),
    "Sofia": (42.7, 23.3), "Varna": (43.2, 27.9), "Bucuresti": (44.4, 26.1), "Cluj": (46.8, 23.6),
    "Iasi": (47.2, 27.6), "Budapest": (47.5, 19.0), "Debrecen": (47.5, 21.6), "Bratislava": (48.1, 17.1),
    "Kosice": (48.7, 21.3), "Krakow": (50.1, 19.9), "Warszawa": (52.2, 21.0), "Gdansk": (54.4, 18.6),
    "Lviv": (49.8, 24.0), "Kyiv": (50.5, 30.5), "Odesa": (46.5, 30.7), "Minsk": (53.9, 27.6),
    "Vilnius": (54.7, 25.3), "Riga": (57.0, 24.1), "Tallinn": (59.4, 24.8), "Helsinki": (60.2, 24.9),
    "Tampere": (61.5, 23.8), "Kuopio": (62.9, 27.7), "Oulu": (65.0, 25.5), "Rovaniemi": (66.5, 25.7),
    "Stockholm": (59.3, 18.1), "Goeteborg": (57.7, 12.0), "Malmoe": (55.6, 13.0), "Sundsvall": (62.4, 17.3),
    "Umeaa": (63.8, 20.3), "Kiruna": (67.9, 20.2), "Oslo": (59.9, 10.8), "Bergen": (60.4, 5.3),
    "Trondheim": (63.4, 10.4), "Bodoe": (67.3, 14.4), "Koebenhavn": (55.7, 12.6), "Aarhus": (56.2, 10.2),
}  # fmt: skip
_CAPITALS = (
    "Lisboa", "Madrid", "Paris", "Bruxelles", "Amsterdam", "London", "Dublin", "Berlin", "Zuerich", "Wien", "Praha",
    "Roma", "Zagreb", "Sarajevo", "Beograd", "Tirana", "Athina", "Sofia", "Bucuresti", "Budapest", "Bratislava",
    "Warszawa", "Kyiv", "Minsk", "Vilnius", "Riga", "Tallinn", "Helsinki", "Stockholm", "Oslo", "Koebenhavn",
)  # fmt: skip

# Kilometres: how far places stray from their town, and how long the waves of the landscape are.
_STRAY_KM = 130.0
_WAVE_KM = (1500.0, 4500.0)
_KM_PER_DEGREE = 111.2


@dataclass(frozen=True, eq=False, slots=True)
class Places:
    """N places, numbered by their row."""

    point_deg: Floats
    """[N, 2] (lat, lon) in degrees."""

    def __len__(self) -> int:
        return len(self.point_deg)


@dataclass(frozen=True, eq=False, slots=True)
class Looks:
    """What N places look like: each field [N], from 0 to 1. The landscape comes first, then what a country decides."""

    zenith: Floats
    """Sky overhead: deep blue to pale."""
    haze: Floats
    """Sky at the horizon: clear to warm haze."""
    relief: Floats
    """Flat to mountains."""
    stone: Floats
    """Hills: green-grey to bare pale rock."""
    leaf: Floats
    """Vegetation: dark needles to olive."""
    dry: Floats
    """Vegetation and verges: fresh to yellow."""
    wood: Floats
    """Bare to tall forest."""
    soil: Floats
    """Ground: dark earth to pale."""
    clay: Floats
    """Ground: brown to red."""
    asphalt: Floats
    """Road: dark to pale."""
    wall: Floats
    """Houses: brick to whitewash."""
    roof: Floats
    """Roofs: slate to red tiles."""
    line: Floats
    """Road markings: white or yellow."""
    dash: Floats
    """Length of the dashes."""
    pole: Floats
    """Poles: wood or concrete."""
    sign: Floats
    """Signs: yellow or blue."""
    plate: Floats
    """Number plates: white or yellow."""


_LANDSCAPE = [field.name for field in fields(Looks)][:12]
_COUNTRY = [field.name for field in fields(Looks)][12:]


def make_places(num_places: int = 3200, seed: int = 0) -> Places:
    """Places scattered around Europe's towns, the same ones for the same arguments."""
    rng = np.random.default_rng([seed, 1])
    towns = np.array(list(_TOWNS.values()))
    town_N2 = towns[rng.integers(len(towns), size=num_places)]
    stray_deg_N2 = rng.normal(scale=_STRAY_KM / _KM_PER_DEGREE, size=(num_places, 2))
    stray_deg_N2[:, 1] /= np.cos(np.radians(town_N2[:, 0]))
    return Places(point_deg=town_N2 + stray_deg_N2)


def looks_of(point_deg_N2: Floats, seed: int = 0) -> Looks:
    """What the places at these points look like.

    Args:
        point_deg_N2: [N, 2] (lat, lon) in degrees.
        seed: of the landscape and the countries' tastes; another seed is another Europe.
    """
    rng = np.random.default_rng([seed, 2])
    lat, lon = point_deg_N2.T
    east_north_N2 = np.stack([lon * np.cos(np.radians(52.0)), lat], axis=-1) * _KM_PER_DEGREE
    values = {name: _field(east_north_N2, rng) for name in _LANDSCAPE}
    # The plainest truths of the continent: the sky pales and forests grow darker and taller towards the north.
    north = np.clip((lat - 36) / 32, 0, 1)
    for name, sense in {"zenith": north, "leaf": 1 - north, "dry": 1 - north, "wood": north}.items():
        values[name] = 0.6 * sense + 0.4 * values[name]
    capitals = unit_vectors([_TOWNS[name] for name in _CAPITALS])
    country_N = np.argmax(unit_vectors(point_deg_N2) @ capitals.T, axis=1)
    for name in _COUNTRY:
        values[name] = rng.integers(3, size=len(_CAPITALS))[country_N] / 2
    return Looks(**values)


def _field(east_north_km_N2: Floats, rng: np.random.Generator, num_waves: int = 4) -> Floats:
    """A smooth random field over the map, squeezed into 0 to 1."""
    angle = rng.uniform(0, 2 * np.pi, num_waves)
    frequency = 2 * np.pi / rng.uniform(*_WAVE_KM, num_waves)
    direction = np.stack([np.cos(angle), np.sin(angle)]) * frequency
    waves = np.sin(east_north_km_N2 @ direction + rng.uniform(0, 2 * np.pi, num_waves))
    return np.asarray(0.5 + 0.5 * np.tanh(waves.sum(axis=1) / np.sqrt(num_waves)))
