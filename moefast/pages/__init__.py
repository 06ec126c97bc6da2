"""Pages and pictures: one palette, SVG that stands in a page, and templates of HTML."""
