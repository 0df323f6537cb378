// The scenarios of `versions` about records, and about the replicas that hold them.
//
// Invariant: every record comes from a Produce of one version, and all of them are read by a Fetch of
// each: `written` records in partition 0 of the topic, with values and times that follow from their
// offsets.
package main

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"

	"github.com/twmb/franz-go/pkg/kmsg"
)

const (
	unsupportedVersion int16 = 35
	// Produce before this one is advertised, as by Apache Kafka 4, and refused.
	firstProduce int16 = 3
	timeStep     int64 = 1000

	timeLatest, timeEarliest, timeOfMax, timeEarliestLocal, timeLatestTiered int64 = -1, -2, -3, -4, -5
)

func valueAt(offset int64) string { return fmt.Sprintf("record %d", offset) }

// timeAt is near the present, so that retention keeps the records.
func (s *session) timeAt(offset int64) int64 { return s.began.UnixMilli() + offset*timeStep }

// batchOf is a batch of the one record that belongs at an offset.
func (s *session) batchOf(offset int64) []byte {
	record := kmsg.NewRecord()
	record.Key, record.Value = []byte("key"), []byte(valueAt(offset))
	// Without the length itself, which takes a byte as long as it is 0.
	record.Length = int32(len(record.AppendTo(nil)) - 1)
	batch := kmsg.NewRecordBatch()
	batch.Magic, batch.NumRecords, batch.PartitionLeaderEpoch = 2, 1, -1
	batch.FirstTimestamp, batch.MaxTimestamp = s.timeAt(offset), s.timeAt(offset)
	batch.ProducerID, batch.ProducerEpoch, batch.FirstSequence = -1, -1, -1
	batch.Records = record.AppendTo(nil)
	bytes := batch.AppendTo(nil)
	binary.BigEndian.PutUint32(bytes[8:], uint32(len(bytes)-12))
	binary.BigEndian.PutUint32(bytes[17:], crc32.Checksum(bytes[21:], crc32.MakeTable(crc32.Castagnoli)))
	return bytes
}

func (s *session) produceRecord(version int16) {
	request := kmsg.NewPtrProduceRequest()
	request.Acks, request.TimeoutMillis = -1, adminTimeoutMS
	topic := kmsg.NewProduceRequestTopic()
	topic.Topic, topic.TopicID = mainTopic, s.topicID
	partition := kmsg.NewProduceRequestTopicPartition()
	partition.Records = s.batchOf(s.written)
	topic.Partitions = append(topic.Partitions, partition)
	request.Topics = append(request.Topics, topic)
	response := ask[*kmsg.ProduceResponse](s, request, version)
	expect(s, response, "number of topics", len(response.Topics), 1)
	for _, topic := range response.Topics {
		s.checkTopicKey(response, topic.Topic, topic.TopicID, version >= 13)
		expect(s, response, "number of partitions", len(topic.Partitions), 1)
		for _, told := range topic.Partitions {
			if version < firstProduce {
				expect(s, response, "error code", told.ErrorCode, unsupportedVersion)
				continue
			}
			expect(s, response, "error code", told.ErrorCode, 0)
			expect(s, response, "base offset", told.BaseOffset, s.written)
			expect(s, response, "log append time", told.LogAppendTime, -1)
			if version >= 5 {
				expect(s, response, "log start offset", told.LogStartOffset, 0)
			}
			s.written = told.BaseOffset + 1
		}
	}
}

// checkTopicKey: the topic, by its name or by its id.
func (s *session) checkTopicKey(response kmsg.Response, name string, id [16]byte, byID bool) {
	if byID {
		expect(s, response, "topic id", id, s.topicID)
	} else {
		expect(s, response, "topic", name, mainTopic)
	}
}

func (s *session) fetch(version int16) {
	request := kmsg.NewPtrFetchRequest()
	request.ReplicaID, request.MaxWaitMillis, request.MaxBytes = -1, 500, 1<<20
	topic := kmsg.NewFetchRequestTopic()
	topic.Topic, topic.TopicID = mainTopic, s.topicID
	partition := kmsg.NewFetchRequestTopicPartition()
	partition.PartitionMaxBytes = 1 << 20
	topic.Partitions = append(topic.Partitions, partition)
	request.Topics = append(request.Topics, topic)
	response := ask[*kmsg.FetchResponse](s, request, version)
	expect(s, response, "error code of all", response.ErrorCode, 0)
	expect(s, response, "number of topics", len(response.Topics), 1)
	for _, topic := range response.Topics {
		s.checkTopicKey(response, topic.Topic, topic.TopicID, version >= 13)
		expect(s, response, "number of partitions", len(topic.Partitions), 1)
		for _, told := range topic.Partitions {
			expect(s, response, "error code", told.ErrorCode, 0)
			expect(s, response, "high watermark", told.HighWatermark, s.written)
			expect(s, response, "last stable offset", told.LastStableOffset, s.written)
			if version >= 5 {
				expect(s, response, "log start offset", told.LogStartOffset, 0)
			}
			expect(s, response, "number of records", s.checkRecords(response, told.RecordBatches), s.written)
		}
	}
}

// checkRecords counts records, each of which has to be the one of its offset.
func (s *session) checkRecords(response kmsg.Response, batches []byte) int64 {
	count := int64(0)
	for len(batches) > 12 {
		size := 12 + int(binary.BigEndian.Uint32(batches[8:]))
		if size > len(batches) {
			s.wrong("%s: a batch of %d bytes, %d are left", nameOf(response), size, len(batches))
			return count
		}
		var batch kmsg.RecordBatch
		var record kmsg.Record
		if err := batch.ReadFrom(batches[:size]); err != nil {
			s.wrong("%s: batch %d: %v", nameOf(response), count, err)
		} else if err := record.ReadFrom(batch.Records); err != nil {
			s.wrong("%s: record %d: %v", nameOf(response), count, err)
		}
		expect(s, response, "offset", batch.FirstOffset, count)
		expect(s, response, "time", batch.FirstTimestamp, s.timeAt(count))
		expect(s, response, "value", string(record.Value), valueAt(count))
		batches = batches[size:]
		count++
	}
	expect(s, response, "bytes after the batches", len(batches), 0)
	return count
}

func (s *session) listOffsets(version int16) {
	last := s.written - 1
	cases := []struct {
		from                    int16
		asked, offset, recordAt int64
	}{
		{1, timeLatest, s.written, -1},
		{1, timeEarliest, 0, -1},
		{1, s.timeAt(2) - 1, 2, s.timeAt(2)},
		{1, s.timeAt(last) + 1, -1, -1},
		{7, timeOfMax, last, s.timeAt(last)},
		{8, timeEarliestLocal, 0, -1},
		{9, timeLatestTiered, -1, -1},
	}
	for _, c := range cases {
		if version < c.from {
			continue
		}
		response, told := s.offsetAt(c.asked, version)
		what := fmt.Sprintf("time %d: ", c.asked)
		expect(s, response, what+"error code", told.ErrorCode, 0)
		expect(s, response, what+"offset", told.Offset, c.offset)
		expect(s, response, what+"time", told.Timestamp, c.recordAt)
		if version >= 4 && c.offset >= 0 {
			expect(s, response, what+"has a leader epoch", told.LeaderEpoch >= 0, true)
		}
	}
}

func (s *session) offsetAt(timestamp int64, version int16) (kmsg.Response, kmsg.ListOffsetsResponseTopicPartition) {
	request := kmsg.NewPtrListOffsetsRequest()
	request.ReplicaID, request.TimeoutMillis = -1, adminTimeoutMS
	topic := kmsg.NewListOffsetsRequestTopic()
	topic.Topic = mainTopic
	partition := kmsg.NewListOffsetsRequestTopicPartition()
	partition.Timestamp = timestamp
	topic.Partitions = append(topic.Partitions, partition)
	request.Topics = append(request.Topics, topic)
	response := ask[*kmsg.ListOffsetsResponse](s, request, version)
	if len(response.Topics) != 1 || len(response.Topics[0].Partitions) != 1 {
		s.wrong("%s: not one partition: %v", nameOf(response), response.Topics)
		return response, kmsg.NewListOffsetsResponseTopicPartition()
	}
	expect(s, response, "topic", response.Topics[0].Topic, mainTopic)
	expect(s, response, "partition", response.Topics[0].Partitions[0].Partition, 0)
	return response, response.Topics[0].Partitions[0]
}

func (s *session) offsetForLeaderEpoch(version int16) {
	_, newest := s.offsetAt(timeLatest, s.latest(kmsg.ListOffsets))
	request := kmsg.NewPtrOffsetForLeaderEpochRequest()
	request.ReplicaID = -1
	topic := kmsg.NewOffsetForLeaderEpochRequestTopic()
	topic.Topic = mainTopic
	partition := kmsg.NewOffsetForLeaderEpochRequestTopicPartition()
	partition.LeaderEpoch = newest.LeaderEpoch
	topic.Partitions = append(topic.Partitions, partition)
	request.Topics = append(request.Topics, topic)
	response := ask[*kmsg.OffsetForLeaderEpochResponse](s, request, version)
	expect(s, response, "number of topics", len(response.Topics), 1)
	for _, topic := range response.Topics {
		expect(s, response, "topic", topic.Topic, mainTopic)
		expect(s, response, "number of partitions", len(topic.Partitions), 1)
		for _, told := range topic.Partitions {
			expect(s, response, "error code", told.ErrorCode, 0)
			expect(s, response, "leader epoch", told.LeaderEpoch, newest.LeaderEpoch)
			expect(s, response, "end offset", told.EndOffset, s.written)
		}
	}
}

func (s *session) deleteRecords(version int16) {
	request := kmsg.NewPtrDeleteRecordsRequest()
	request.TimeoutMillis = adminTimeoutMS
	topic := kmsg.NewDeleteRecordsRequestTopic()
	topic.Topic = mainTopic
	partition := kmsg.NewDeleteRecordsRequestTopicPartition()
	partition.Offset = int64(version) + 1
	topic.Partitions = append(topic.Partitions, partition)
	request.Topics = append(request.Topics, topic)
	response := ask[*kmsg.DeleteRecordsResponse](s, request, version)
	expect(s, response, "number of topics", len(response.Topics), 1)
	for _, topic := range response.Topics {
		expect(s, response, "topic", topic.Topic, mainTopic)
		expect(s, response, "number of partitions", len(topic.Partitions), 1)
		for _, told := range topic.Partitions {
			expect(s, response, "error code", told.ErrorCode, 0)
			expect(s, response, "low watermark", told.LowWatermark, partition.Offset)
		}
	}
	_, start := s.offsetAt(timeEarliest, s.latest(kmsg.ListOffsets))
	expect(s, response, "log start offset afterwards", start.Offset, partition.Offset)
}

func (s *session) initProducerID(version int16) {
	request := kmsg.NewPtrInitProducerIDRequest()
	request.ProducerID, request.ProducerEpoch = -1, -1
	response := ask[*kmsg.InitProducerIDResponse](s, request, version)
	expect(s, response, "error code", response.ErrorCode, 0)
	expect(s, response, "producer epoch", response.ProducerEpoch, 0)
	expect(s, response, "is a new producer id", response.ProducerID > s.producerID, true)
	s.producerID = response.ProducerID
}
