// Waiting: for a condition with a deadline, or, where the pace of writes is given, no longer than anybody wants them.
package main

import (
	"context"
	"time"
)

// lookInterval is between two looks at a condition.
const lookInterval = 20 * time.Millisecond

// until looks until the condition holds, and tells whether it did by the deadline.
func until(deadline time.Time, holds func() bool) bool {
	ctx, cancel := context.WithDeadline(context.Background(), deadline)
	defer cancel()
	for !holds() {
		if !pace(ctx, lookInterval) {
			return holds()
		}
	}
	return true
}

// pace lets time pass before the next write, and tells whether it has: not if ctx ended first.
func pace(ctx context.Context, pause time.Duration) bool {
	timer := time.NewTimer(pause)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}
