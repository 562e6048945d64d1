"""`data=glyphs_100k`: every Unicode character that Debian's fonts draw in several typefaces. See docs/glyphs_100k.md."""
