"""An index of documents: passages with their vectors in LanceDB, searched by words and meaning."""
