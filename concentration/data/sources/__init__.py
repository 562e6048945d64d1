"""The sources of images for `prepare`: each has a configuration class, and their `kind` tells them apart."""

from typing import Annotated

import pydantic

from concentration.data.sources.csv_table import CsvConfig, CsvSource
from concentration.data.sources.glyph_scenes import GlyphScenesConfig, GlyphScenesSource
from concentration.data.sources.glyphs import GlyphsConfig, GlyphSource
from concentration.data.sources.glyphs_100k.source import Glyphs100kConfig, Glyphs100kSource
from concentration.data.sources.image_files import ImageFilesConfig
from concentration.data.sources.image_folder import ImageFolderConfig, ImageFolderSource
from concentration.data.sources.inaturalist import INaturalistConfig, INaturalistSource
from concentration.data.sources.open_images import OpenImagesConfig, OpenImagesSource
from concentration.data.sources.source import Source
from concentration.data.sources.webdataset_shards import ShardsConfig

ImagesConfig = (
    GlyphsConfig
    | Glyphs100kConfig
    | GlyphScenesConfig
    | ImageFolderConfig
    | CsvConfig
    | OpenImagesConfig
    | INaturalistConfig
)
DataConfig = Annotated[ImagesConfig | ShardsConfig, pydantic.Field(discriminator="kind")]

_SOURCES = {
    GlyphsConfig: GlyphSource,
    Glyphs100kConfig: Glyphs100kSource,
    GlyphScenesConfig: GlyphScenesSource,
    ImageFolderConfig: ImageFolderSource,
    CsvConfig: CsvSource,
    OpenImagesConfig: OpenImagesSource,
    INaturalistConfig: INaturalistSource,
}


def build_source(config: ImagesConfig) -> Source:
    """The source that a config describes."""
    return _SOURCES[type(config)](config)


def list_places(config: ImagesConfig | ShardsConfig) -> dict[str, str]:
    """The folders and files of the user's own images, by key. Sources that draw their images have none."""
    if not isinstance(config, ImageFilesConfig | ShardsConfig):
        return {}
    given = {name: getattr(config, name, None) for name in ("path", "root", "annotations")}
    return {f"data.{name}": str(place) for name, place in given.items() if place is not None}
