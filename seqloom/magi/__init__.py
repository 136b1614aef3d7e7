"""Attention over any mask on many ranks: masks as slices, dispatch of query chunks, exact exchange of key/value rows."""
