// Waiting for a condition, never for time to pass.
package main

import "time"

// lookInterval is between two looks at a condition.
const lookInterval = 20 * time.Millisecond

// until looks until the condition holds, and tells whether it did by the deadline.
func until(deadline time.Time, holds func() bool) bool {
	for !holds() {
		if time.Now().After(deadline) {
			return false
		}
		time.Sleep(lookInterval)
	}
	return true
}
