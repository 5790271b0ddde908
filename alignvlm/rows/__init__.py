"""Records to the rows of a batch: shared-image packing, labels and token layout."""
