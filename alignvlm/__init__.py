"""AlignVLM, the library: data, rows, evaluation, stages, tools and the quickstart, in the order in which they may import each other."""
