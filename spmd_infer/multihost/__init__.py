"""Jobs of several processes: start-up under any scheduler, agreement between ranks, and a quick end when one fails."""
