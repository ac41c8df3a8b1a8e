"""Results for other libraries: trees for ArviZ, figures by matplotlib."""
