"""Results for other libraries and for readers: trees for ArviZ, figures by matplotlib, a report as one page of HTML."""
