"""From sources to prepared folders of token ids: read, filter, split, encode in chunks, write, cache, report."""
