// The history of a run of the consistency checker: one JSON object per line, in the order in which
// things were noted. `tests/src/checker/history.rs` reads it and says what each event means.
//
// A send is noted before it is issued and its outcome after it is known, under one lock and by one
// clock, so that "this was acknowledged before that began" can be read off the times.
package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"hash/crc32"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"
)

type history struct {
	mu      sync.Mutex
	file    *os.File
	out     *bufio.Writer
	started time.Time
	err     error
	keys    int
}

func newHistory(path string) (*history, error) {
	file, err := os.Create(path)
	if err != nil {
		return nil, err
	}
	return &history{file: file, out: bufio.NewWriterSize(file, 1<<20), started: time.Now()}, nil
}

// note writes {"t":<microseconds>,"e":"<kind>",<fields>}.
func (h *history) note(kind, format string, args ...any) {
	h.mu.Lock()
	defer h.mu.Unlock()
	fmt.Fprintf(h.out, `{"t":%d,"e":"%s"`, time.Since(h.started).Microseconds(), kind)
	if format != "" {
		h.out.WriteByte(',')
		fmt.Fprintf(h.out, format, args...)
	}
	if _, err := h.out.WriteString("}\n"); err != nil && h.err == nil {
		h.err = err
	}
}

// key numbers questions, so that an answer names the question it belongs to.
func (h *history) key() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.keys++
	return h.keys
}

func (h *history) flush() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if err := h.out.Flush(); err != nil {
		return err
	}
	return h.err
}

func quoted(text string) string {
	encoded, _ := json.Marshal(text)
	return string(encoded)
}

// records collects what one reader got from one partition, and notes runs of consecutive offsets.
type run struct {
	first, next int64
	values      []string
}

func (r *run) add(offset int64, value string) (gap bool) {
	if len(r.values) > 0 && offset != r.next {
		return true
	}
	if len(r.values) == 0 {
		r.first = offset
	}
	r.values = append(r.values, value)
	r.next = offset + 1
	return false
}

func (r *run) list() string { return strings.Join(r.values, ",") }

// A value is "<client>/<partition>/<sequence>/<checksum of what follows>/<filling>".
func checkerValue(client, partition, sequence, size int) []byte {
	filling := make([]byte, size)
	for i := range filling {
		filling[i] = 'a' + byte((client+7*partition+31*sequence+i)%26)
	}
	return fmt.Appendf(nil, "%d/%d/%d/%d/%s", client, partition, sequence, crc32.ChecksumIEEE(filling), filling)
}

// parseValue gives "<client>,<sequence>" as the history has it, or what is wrong with the bytes.
func parseValue(partition int, value []byte) (string, error) {
	parts := strings.SplitN(string(value), "/", 5)
	if len(parts) != 5 {
		return "", fmt.Errorf("not a value of this workload: %.40q", value)
	}
	var numbers [4]int
	for i := range numbers {
		n, err := strconv.Atoi(parts[i])
		if err != nil {
			return "", fmt.Errorf("not a value of this workload: %.40q", value)
		}
		numbers[i] = n
	}
	if numbers[1] != partition {
		return "", fmt.Errorf("was written to partition %d: %.40q", numbers[1], value)
	}
	if uint32(numbers[3]) != crc32.ChecksumIEEE([]byte(parts[4])) {
		return "", fmt.Errorf("bytes changed: %.40q", value)
	}
	return fmt.Sprintf("%d,%d", numbers[0], numbers[2]), nil
}
