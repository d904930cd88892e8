"""The files that a run leaves: for each one writer, one reader, one format name and version. numpy and json; no torch."""
