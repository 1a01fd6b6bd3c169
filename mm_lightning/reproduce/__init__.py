"""The paper's claims on small data: runs over seeds, numbers, pictures and one page that shows them."""
