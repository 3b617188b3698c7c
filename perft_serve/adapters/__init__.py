"""An adapter's life on the server: found, validated, in the device arena, gone. Knows no requests and no HTTP."""
