"""Where images come from: one config class a source, told apart by `kind`."""

from typing import Annotated

import pydantic

from concentration.data.sources.glyphs import GlyphsConfig, GlyphSource
from concentration.data.sources.image_folder import ImageFolderConfig, ImageFolderSource
from concentration.data.sources.source import Source
from concentration.data.sources.webdataset_shards import ShardsConfig

DataConfig = Annotated[GlyphsConfig | ImageFolderConfig | ShardsConfig, pydantic.Field(discriminator="kind")]

_SOURCES = {GlyphsConfig: GlyphSource, ImageFolderConfig: ImageFolderSource}


def build_source(config: GlyphsConfig | ImageFolderConfig) -> Source:
    """The source that a config describes."""
    return _SOURCES[type(config)](config)
