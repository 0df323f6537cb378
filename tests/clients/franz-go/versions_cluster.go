// The scenarios of `versions` about configurations and about where replicas are.
//
// Invariant: what was altered is looked up by another request; nothing is moved, and what has nothing
// to do has to say so.
package main

import (
	"fmt"
	"strconv"

	"github.com/twmb/franz-go/pkg/kmsg"
)

// describeLogDirs asks for the replicas of the one broker that the endpoint stands for.
func (s *session) describeLogDirs(version int16) {
	request := kmsg.NewPtrDescribeLogDirsRequest()
	topic := kmsg.NewDescribeLogDirsRequestTopic()
	topic.Topic, topic.Partitions = mainTopic, []int32{0, 1, 2}
	request.Topics = append(request.Topics, topic)
	response := ask[*kmsg.DescribeLogDirsResponse](s, request, version)
	expect(s, response, "error code of all", response.ErrorCode, 0)
	expect(s, response, "number of folders", len(response.Dirs), 1)
	for _, dir := range response.Dirs {
		expect(s, response, "error code", dir.ErrorCode, 0)
		expect(s, response, "has a path", dir.Dir != "", true)
		if version >= 4 {
			expect(s, response, "tells the disk's size", dir.TotalBytes > 0, true)
			expect(s, response, "tells what is free", dir.UsableBytes > 0, true)
		}
		expect(s, response, "number of topics", len(dir.Topics), 1)
		for _, topic := range dir.Topics {
			expect(s, response, "topic", topic.Topic, mainTopic)
			expect(s, response, "number of partitions", len(topic.Partitions), partitions)
			for _, told := range topic.Partitions {
				expect(s, response, "is a future replica", told.IsFuture, false)
			}
		}
	}
}

func (s *session) electLeaders(version int16) {
	request := kmsg.NewPtrElectLeadersRequest()
	request.TimeoutMillis = adminTimeoutMS
	topic := kmsg.NewElectLeadersRequestTopic()
	topic.Topic, topic.Partitions = mainTopic, []int32{0}
	request.Topics = append(request.Topics, topic)
	response := ask[*kmsg.ElectLeadersResponse](s, request, version)
	expect(s, response, "error code of all", response.ErrorCode, 0)
	expect(s, response, "number of topics", len(response.Topics), 1)
	for _, topic := range response.Topics {
		expect(s, response, "topic", topic.Topic, mainTopic)
		expect(s, response, "number of partitions", len(topic.Partitions), 1)
		for _, told := range topic.Partitions {
			// Not needed, unless the cluster had chosen another leader.
			ok := told.ErrorCode == 0 || told.ErrorCode == electionNotNeeded
			expect(s, response, fmt.Sprintf("error code %d is due", told.ErrorCode), ok, true)
		}
	}
}

// reassignments cancels a move that there is not, and lists none.
func (s *session) reassignments(version int16) {
	cancel := kmsg.NewPtrAlterPartitionAssignmentsRequest()
	cancel.TimeoutMillis = adminTimeoutMS
	topic := kmsg.NewAlterPartitionAssignmentsRequestTopic()
	topic.Topic = mainTopic
	partition := kmsg.NewAlterPartitionAssignmentsRequestTopicPartition()
	partition.Partition = 1
	topic.Partitions = append(topic.Partitions, partition)
	cancel.Topics = append(cancel.Topics, topic)
	cancelled := ask[*kmsg.AlterPartitionAssignmentsResponse](s, cancel, version)
	expect(s, cancelled, "error code of all", cancelled.ErrorCode, 0)
	expect(s, cancelled, "number of topics", len(cancelled.Topics), 1)
	for _, topic := range cancelled.Topics {
		expect(s, cancelled, "topic", topic.Topic, mainTopic)
		expect(s, cancelled, "number of partitions", len(topic.Partitions), 1)
		for _, told := range topic.Partitions {
			expect(s, cancelled, "partition", told.Partition, 1)
			expect(s, cancelled, "error code", told.ErrorCode, noReassignment)
		}
	}
	list := kmsg.NewPtrListPartitionReassignmentsRequest()
	list.TimeoutMillis = adminTimeoutMS
	listed := ask[*kmsg.ListPartitionReassignmentsResponse](s, list, version)
	expect(s, listed, "error code", listed.ErrorCode, 0)
	expect(s, listed, "number of topics", len(listed.Topics), 0)
}

func (s *session) unregisterBroker(version int16) {
	request := kmsg.NewPtrUnregisterBrokerRequest()
	request.BrokerID = 99
	response := ask[*kmsg.UnregisterBrokerResponse](s, request, version)
	expect(s, response, "error code for a broker that there is not", response.ErrorCode, brokerIDNotRegistered)
}

func (s *session) configs(version int16) {
	value := strconv.Itoa(7_200_000 + int(version))
	alter := kmsg.NewPtrIncrementalAlterConfigsRequest()
	resource := kmsg.NewIncrementalAlterConfigsRequestResource()
	resource.ResourceType, resource.ResourceName = kmsg.ConfigResourceType(topicKind), mainTopic
	config := kmsg.NewIncrementalAlterConfigsRequestResourceConfig()
	config.Name, config.Value = retentionMS, kmsg.StringPtr(value)
	resource.Configs = append(resource.Configs, config)
	alter.Resources = append(alter.Resources, resource)
	altered := ask[*kmsg.IncrementalAlterConfigsResponse](s, alter, version)
	expect(s, altered, "number of resources", len(altered.Resources), 1)
	for _, told := range altered.Resources {
		expect(s, altered, "error code", told.ErrorCode, 0)
		expect(s, altered, "resource", told.ResourceName, mainTopic)
		expect(s, altered, "type", int8(told.ResourceType), topicKind)
	}
	s.describeConfigs(version, value)
}

func (s *session) describeConfigs(version int16, value string) {
	request := kmsg.NewPtrDescribeConfigsRequest()
	request.IncludeSynonyms, request.IncludeDocumentation = true, true
	asked := kmsg.NewDescribeConfigsRequestResource()
	asked.ResourceType, asked.ResourceName = kmsg.ConfigResourceType(topicKind), mainTopic
	asked.ConfigNames = []string{retentionMS}
	request.Resources = append(request.Resources, asked)
	response := ask[*kmsg.DescribeConfigsResponse](s, request, version)
	expect(s, response, "number of resources", len(response.Resources), 1)
	for _, told := range response.Resources {
		expect(s, response, "error code", told.ErrorCode, 0)
		expect(s, response, "resource", told.ResourceName, mainTopic)
		expect(s, response, "number of configs", len(told.Configs), 1)
		for _, config := range told.Configs {
			expect(s, response, "config", config.Name, retentionMS)
			expect(s, response, "value", text(config.Value), value)
			expect(s, response, "source", int8(config.Source), topicConfig)
			expect(s, response, "has synonyms", len(config.ConfigSynonyms) > 0, true)
			if response.Version >= 3 {
				expect(s, response, "type", config.ConfigType, kmsg.ConfigTypeLong)
				expect(s, response, "has documentation", text(config.Documentation) != "", true)
			}
		}
	}
}
